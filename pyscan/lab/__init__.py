"""The laboratory: a real guest, a private broker, and an attacker to watch.

Used by the demonstration, the tests and the benchmarks. Product code never imports it,
and only here is a target's memory ever written.
"""

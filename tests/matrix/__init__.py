"""The matrix: one kernel package, booted in every way that changes its bytes in memory.

`configurations` says what is booted, `scenario` what then happens inside, `attacks` what a
rootkit does to it, and `run` boots all of it and asks a callable what it makes of each.
"""

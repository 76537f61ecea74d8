"""A broker that is against us, and a machine that counts what is done to it.

The broker speaks MQTT 5 to the programs as processes, hears all that they say, and tells them
what it likes. It has every message that was ever sent, and no key.
"""

"""Who is believed: the signed key set, how programs follow it, and the root that makes it."""

from pyscan.trust.keeper import Keeper, SetFiles
from pyscan.trust.keyset import KeyEntry, KeySet, Role, decode_key_set, encode_key_set

__all__ = [
    "Keeper",
    "KeyEntry",
    "KeySet",
    "Role",
    "SetFiles",
    "decode_key_set",
    "encode_key_set",
]

"""Page digests: one interface, two backends that give the same bytes.

The backend is an explicit setting (`open_backend("native")` or ``"numba"``) and is
never swapped silently.
"""

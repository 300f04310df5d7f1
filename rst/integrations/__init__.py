"""RST where a framework owns the loop, a module each: `lightning`, `transformers`, `timm`.

Each imports its framework, and nothing imports them. Elsewhere `RST.passes` is all that a loop needs.
"""

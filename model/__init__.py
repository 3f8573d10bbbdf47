"""The network: pure `nn.Module`s and the numbers that define them.

Axis letters, used throughout: `b` batch, `n` visual tokens, `t` text tokens, `l = n + t`, `d` model width,
`s` tapped depths, `v` vision width, `p` values of one alignment target, `h` heads.
"""

"""The algebra of the KV up-projection W_UKV: split it into W_UK and W_UV, or fold it into its neighbors.

split  The KV up-projection split into W_UK and W_UV, and fused again, in torch
fold   Absorbed forms of the KV up-projection in numpy: `split` and `fold`, what each costs, and where `fold` is exact
"""

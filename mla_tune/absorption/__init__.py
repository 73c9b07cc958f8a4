"""The algebra of the KV up-projection: split into W_UK and W_UV, or folded into its neighbors.

split  The fused KV up-projection and its two halves per head
fold   Absorbed forms of the KV up-projection in numpy: `split` and `fold`, what each costs, and where `fold` is exact
"""

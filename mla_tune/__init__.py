"""mla-tune: fine-tune models with Multi-head Latent Attention, merge and absorb the result, and prove it right."""

__version__ = "0.1.0"

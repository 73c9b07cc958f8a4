"""What an MLA model is made of, as its config.json describes it: no torch, no weights.

roles        The roles a weight matrix plays in an MLA model, and what is known about an adapter on each
dims         The dimensions of Multi-head Latent Attention, and the KV cache that follows from them
site         What an architecture is made of: one `Site` for each weight matrix
family       An entry of the family table: `Family`, with its mixture-of-experts block, `MoELayout`
families     The family table: one entry for each model type whose layout mla-tune knows
layer_types  Rules for what each decoder layer is, by the names that the family table uses; they read a config.json's
             keys
key_mapping  Names of weights on disk from those in transformers' module tree
parts        Weights that are described by their shape alone: what no adapter sits on, and vectors, which are counted
             only
multimodal   Models around an MLA text model: where the text model is, how checkpoints call it, and what else is in
             them
config       A text model's config.json as the registry reads it: keys under all their names, and sizes by letter
build        config.json → `Architecture`
recognize    Which family a config.json belongs to: its entry in the family table, or an error that says what the
             model is
fallback     A model type that has MLA and no entry in the family table: taken for a plain relative of DeepSeek, or
             refused
"""

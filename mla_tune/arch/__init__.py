"""What an MLA model is made of, as its config.json describes it: no torch, no weights.

`build.architecture(config)` is the way in: from a parsed config.json to an `Architecture` with one `Site` for each
weight matrix.

roles        Roles: what each weight matrix of an MLA model is for, and what an adapter on it does
dims         The dimensions of one attention module with MLA, and the bytes of KV cache that follow from them
site         `Architecture`: an MLA model as its config.json describes it, with one `Site` for each weight matrix
build        Build an `Architecture` from config.json: `architecture`
recognize    Find the family of a config.json in the family table, or raise an error that says what kind of model it is
fallback     Model types that have MLA but no entry in the family table: read as a plain relative of DeepSeek-V2, or
             refused
families     The family table: one entry for each model type whose layout mla-tune knows
family       `Family` and `MoELayout`: the types of an entry of the family table
parts        `Part`: a weight in the family table that is not one of the common matrices, described by its path and
             shape alone
key_mapping  `KeyMapping`: from a name in transformers' module tree to the keys that a checkpoint may use for it
layer_types  Rules that say what each decoder layer is, from config.json: its kind of attention, experts, indexer,
             dimensions
multimodal   Wrappers: models around an MLA text model (vision, audio), where the text model is, and what else they hold
config       Read a text model's config.json: a key under any of its names, with the family's default; sizes by letter
"""

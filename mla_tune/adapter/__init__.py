"""Where an adapter sits, what its method is, and what its files hold.

methods          Adapter methods: what LoRA, rsLoRA and DoRA are, in one place
placement        Roles of a recipe → the exact matrices to adapt, with rank, alpha and learning-rate factor of each
peft_config      A `Placement` → the PEFT `LoraConfig` that reaches exactly those matrices, also after save and load
settings         adapter_config.json: which settings leave an adapter that can be merged exactly, and rank and scale
                 of each name
keys             The keys of an adapter file → where in the base model each tensor belongs
deltas           What an opened adapter consists of: its low-rank updates (`LoraDelta`) and its whole tensors
                 (`SavedTensor`)
files            A PEFT adapter folder → which low-rank factors sit on which site, and which whole tensors replace the
                 base's
merge_options    What a user may choose about a merge: the options of `merge-absorb`, and which values they can have
megatron         Names that NVIDIA's NeMo, Megatron-Bridge and Automodel give to adapters on MLA → sites
import_megatron  An adapter in the names of NeMo, Megatron-Bridge or Automodel → a PEFT adapter for transformers'
                 model
"""

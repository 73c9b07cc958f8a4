"""Adapters: what a method is, which matrices an adapter is on, and what its files hold.

methods          Adapter methods: `AdapterMethod`, and its instances LoRA, rsLoRA and DoRA
placement        Placement: from the roles in a recipe to the exact matrices to adapt, with rank, alpha and learning
                 rate of each
peft_config      Turn a `Placement` into the PEFT `LoraConfig` that adapts exactly its matrices, also after saving and
                 loading
settings         Read adapter_config.json: refuse settings that can't be merged exactly, and give rank and scale of each
                 matrix
keys             Map the keys of an adapter file to the matrices and tensors of the base model (`AdapterKeys`)
deltas           `Adapter`: an opened adapter, with its low-rank updates (`LoraDelta`) and its fully trained tensors
                 (`SavedTensor`)
files            Open a PEFT adapter folder: which low-rank update belongs to which site, which tensors replace tensors
                 of the base
merge_options    `MergeOptions`: the options of `merge-absorb` that decide what is written, and the values that are
                 allowed
megatron         Map the names that NVIDIA's NeMo, Megatron-Bridge and Automodel give to adapters on MLA to sites
                 (`MegatronNames`)
import_megatron  Import an adapter of NVIDIA's NeMo, Megatron-Bridge or Automodel as a PEFT adapter for transformers'
                 model
"""

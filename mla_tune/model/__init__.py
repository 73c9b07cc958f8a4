"""Models in memory: loaded, adapted by PEFT, with weights that may stay quantized.

load              A recipe's model section → a transformers model with its architecture
auto              What differs between transformers' classes for text models and for models around one
tokenizer         Tokenizers: which one a recipe's model has, and loading it
attach            Attach the planned adapter with PEFT, then compare what is there with what was planned
lora_init         How the factors A and B of a LoRA begin (`adapter.init`)
modules_to_save   `adapter.modules_to_save`: modules that are trained whole beside the LoRA
quantized_linear  Frozen weights that stay quantized in memory: `QuantizedLinear`, and routed experts that read such
                  weights
quantized_base    Bases whose matrices stay quantized in memory while adapters are trained on them: one entry a format
fp8               Checkpoints in block FP8 (DeepSeek-V3's layout and its relatives): the codes go into memory as they
                  are
nf4               NF4: the frozen matrices of a plain checkpoint in 4 bits, made when they are read (QLoRA,
                  arXiv:2305.14314)
"""

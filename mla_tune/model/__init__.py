"""Models in memory: loaded, adapted by PEFT, with weights that may stay quantized.

load              Load the model of a recipe, or build a preset, and check it against its architecture
auto              Handle differences between transformers' classes for text models and for multimodal models
tokenizer         Find and load the tokenizer of a recipe's model
attach            Attach the planned adapter with PEFT, and compare what PEFT attached with the plan
lora_init         Initialize the factors A and B of a LoRA (`adapter.init`)
modules_to_save   Train complete modules beside the LoRA (`adapter.modules_to_save`)
quantized_linear  Layers whose frozen weights stay quantized in memory: `QuantizedLinear`, and routed experts
quantized_base    The table of formats that a base model can keep in memory, and which of them a base has
fp8               Keep a checkpoint in block FP8 in memory as it is (DeepSeek-V3's layout and its relatives)
nf4               Quantize the frozen matrices of a plain checkpoint to NF4 while it is read (QLoRA, arXiv:2305.14314)
"""

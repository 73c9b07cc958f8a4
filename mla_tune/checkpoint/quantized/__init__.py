"""Quantized weights on disk: one file for each family of formats, behind one interface (`sockets.QUANT_FORMATS`).

base        The interface of a checkpoint format: `QuantFormat`, and `QuantizedTensor`, one quantized weight
config      Find out which formats config.json declares, and edit it for weights that leave their format
fp8         FP8 weights: find codes and scales, decode rows to numbers, encode numbers
fp8_config  Read and edit what config.json says about FP8 weights
"""

"""Quantized weights on disk: one file a family of formats, behind one interface (`sockets.QUANT_FORMATS`).

base         QuantFormat, what a format must say, and QuantizedTensor, one weight in it
config       which formats config.json declares, and which weights leave a format together
fp8          E4M3 codes with one scale a block, a row or a tensor
fp8_config   what config.json says of FP8 weights, read and edited
"""

"""What is known before any weight is read: facts about a model, limits of its family, memory, and the plan of a run.

inspect         facts about a model from its config.json: layers, roles, parameters, KV cache
check_weights   config.json compared with the headers of a checkpoint
family_limits   what a recipe can't have on a certain family, or where the model is sharded
memory          the memory of a training run, estimated from shapes
plan            what `train` would do with a recipe: matrices, learning rates, steps, memory
gpu_fit         which launch configuration holds a model on so many GPUs
"""

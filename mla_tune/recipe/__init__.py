"""The recipe: a YAML file that says which model is trained, how, and on what; read, checked, and turned into objects.

schema     the sections and keys of a recipe, each with its meaning, unit and default
names      values that are names: roles, groups, presets, adapter methods, objectives
load       a recipe's file and its `--set` overrides → a `Recipe`, or all faults in one error
yaml       the YAML that a recipe is written in: numbers as people write them, a line for every key
renamed    keys that had another name, so that an error can give the new one
checks     advice on recipes that run, and what a quantized base rules out
model_source  the config.json of a model that a user names: a shipped name, a preset, a folder, a file or a hub id
"""

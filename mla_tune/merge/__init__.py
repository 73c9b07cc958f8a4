"""Merging: adapters + base → a checkpoint in the base's own key names, a few rows in memory at a time.

run           `merge_absorb`: all steps in order, and what happens when one fails
plan          headers → every tensor of the output and where its numbers come from, or an error
execute       the shards of a plan, written by several threads
apply         rows of one tensor: weight plus delta, rounded once
absorb_plan   which absorbed tensors there will be
absorb        the absorbed tensors, computed from what was written
export        index, config.json, the base's other files and the manifest
staging       the folder that a merge is built in: locked, resumable, renamed at the end
report        what a merge will do and what it did, as dataclasses
"""

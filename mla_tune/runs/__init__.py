"""Run folders: what lies where, what run.json and metrics.jsonl say, and which runs there are.  Imports no torch.

folder       paths of a run folder; whether a run may use it; making it
record       `RunRecord`: the contents of run.json
checkpoints  checkpoints that are whole or absent
metrics      metrics.jsonl → curves
process      whether the process of a run still runs
find         all runs below a folder, a row each
merge_inputs find and open what a merge reads: the adapters that a user names, their base model, the output folder
"""

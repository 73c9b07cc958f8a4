"""Training: from a recipe to a run folder with an adapter (or, without one, a model) in it.

resolve         recipe → everything that follows from it before data or weights are read, or an error
run             `train`: checks, data, model, run folder; how the run ended
job             what the parts of a run share
loop            adapt the model, build the Trainer, train, write the result
prepare_model   which kernels the run uses, and which parts of the model they replace
objective       the socket for objectives: what a step minimizes
objectives/     the objectives that come with mla-tune
trainer         transformers' Trainer with rates by role, spike guard, and checkpoints that are whole or absent
training_args   recipe → transformers' TrainingArguments
optimizer       recipe → AdamW's parameter groups, one a role
step_totals     loss, metrics and tokens of a step over all micro-batches and processes
gradients       gradient norms by role; adapters that get no gradient
spike_guard     whether a step is skipped
held_out        loss and metrics on held-out rows
callbacks       metrics.jsonl, progress, the gradient check, Ctrl-C
trackers        TensorBoard, W&B, MLflow, trackio
sample_answers  answers to held-out prompts before and after training
save            write the adapter or the model
memory          memory that a run took, and advice where there is too little
environment     versions and machine, for run.json
kernels/        attention, loss, norms and LoRA that are faster or smaller than the stock ones
distributed/    several processes: launching, sharding, the order of rows
"""

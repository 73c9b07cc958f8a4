"""The command line: one thin file a verb, and what the verbs share.

app             `mla-tune`: the verbs, and how an error becomes a message and an exit code
common          What commands share: options that had another name in an earlier version, and paths that can't be used
inspect         `mla-tune inspect`: which layers an adapter can attach to, and what it would do there, from
                config.json alone
plan            `mla-tune plan`: show what `train` would do with a recipe, and which launch configuration fits
data            `mla-tune data`: show the samples that a recipe trains on, with their lengths and counts
train           `mla-tune train`: train an adapter as a recipe says, in this process or in several processes
runs            `mla-tune runs`: list the runs below a folder in a table
merge_absorb    `mla-tune merge-absorb`: merge adapters into their base, split the result for absorbed decoding, and
                prove it
verify          `mla-tune verify`: prove a merged checkpoint, made by any tool, against its base and its adapters
import_adapter  `mla-tune import-adapter`: an adapter of NeMo, Megatron-Bridge or Automodel becomes one for PEFT
serve_check     `mla-tune serve-check`: what an inference engine will do with an adapter or a checkpoint, before it is
                served
generate        `mla-tune generate`: answer prompts with a model, merged or with unmerged adapters
chat            `mla-tune chat`: talk to a model, and switch between its adapters
bench           `mla-tune bench`: measure decoding and training on this machine, against stock transformers and TRL
schema          `mla-tune schema`: the JSON Schema of a recipe, for editors
"""

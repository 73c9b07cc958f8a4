"""Every table, plot, card and page that a person sees, made from plain dictionaries (the documents of `--json`).

inspect_table      mla-tune inspect
plan_table         mla-tune plan
gpu_fit_table      mla-tune plan --gpus N --memory SIZE
data_preview       mla-tune data
bench_train_table  mla-tune bench train
run_report         report.html of a run (report.html.jinja is its template)
plots              loss.png of a run, decode.png of bench decode
card               README.md of an adapter
commands           the commands that report and card suggest
"""

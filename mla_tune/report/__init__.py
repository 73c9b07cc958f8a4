"""Every table, plot, card and page that a person sees, made from the documents of `--json` and from run records.

inspect_table      mla-tune inspect
plan_table         mla-tune plan
gpu_fit_table      mla-tune plan --gpus N --memory SIZE
data_preview       mla-tune data
bench_decode_table mla-tune bench decode
bench_train_table  mla-tune bench train
runs_table         mla-tune runs
run_report         report.html of a run (report.html.jinja is its template)
plots              loss.png of a run, decode.png of bench decode
card               README.md of an adapter
commands           the commands that report and card suggest
"""

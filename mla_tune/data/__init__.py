"""Rows from files or the hub, their tokens and labels, and how they are put into batches.

rows.load_rows → encode.encode → collate.rows_for → collate.Collator
"""

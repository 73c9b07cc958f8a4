"""From the rows of a file or the hub to batches: tokens, labels, packing and padding.

row_kinds      The four kinds of rows: prompt, chat, text and tokens, with the keys of each
files          Read a local file into a table of raw rows, each with its line or row number
converters     Convert a raw row of one format into a row of a kind, with one converter for each value of `data.format`
formats        Detect the format of raw rows, and convert them into rows of one kind
rows           Load the rows that a recipe names, from a file or the hub, as one kind, and hold some out for evaluation
chat           Render chats with a tokenizer's chat template, and find the tokens of the assistant's turns
tokenize_rows  Render and tokenize rows, and find the tokens of each row that are trained
encode         Turn rows into samples of at most `train.max_length` tokens, with labels, and count what was left out
cache          Keep tokenized rows on disk under the hash of everything that they depend on (`data.cache`)
mixing         Mix the samples of several data sets by weight (`data.sources`)
packing        Pack samples of different lengths into rows of one length, by best-fit decreasing
collate        Make trainer rows of samples, packed or not, and padded batches of trainer rows
padding_free   Lay the samples of a batch end to end in one row without padding, and say where each begins
prepare        Prepare a recipe's data: load, tokenize, mix and pack it, and count everything that was cut or left out
preview        The content of `mla-tune data`: samples as text with the trained parts marked, lengths, and packing
reader         Read the raw rows of a data set a few at a time, from any position, pass after pass (`data.streaming`)
stream         The training rows of a streamed data set: read, tokenized and packed while training (`data.streaming`)

A raw row is converted (`formats`), tokenized (`tokenize_rows`), fitted to the length limit as one or several samples
(`encode`), and put into a trainer row, alone or packed with other samples (`collate`).
"""

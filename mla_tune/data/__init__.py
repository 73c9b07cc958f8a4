"""Rows from files or the hub, their tokens and labels, and how they are put into batches.

files         Read a local file into a table of raw rows, each with the place it came from
formats       Bring raw rows of any accepted format into one of three kinds
rows          Find the data that a recipe names, bring it into one kind, and hold a part out for evaluation
chat          Render chats with a tokenizer's template, and find the tokens of the assistant's turns
encode        Rows → samples: token ids, and for each token whether it counts towards the loss
cache         Tokenized rows on disk, found again by the hash of everything that they depend on
mixing        Several data sets, mixed by weight
packing       Put samples of unequal length into rows of one length: best-fit decreasing
collate       Samples → trainer rows → batches
padding_free  Trainer rows → one row of samples end to end, without a token of padding, with the borders beside it
prepare       A recipe's data section → rows that a trainer takes, with counts of everything that was cut or left out
preview       What a person wants to see of prepared data: samples as text, which of it is trained, lengths, packing
reader        A data set that is read as it is needed, from where it was left
stream        Rows for training that are read, tokenized and packed as they are needed (`data.streaming`)
"""

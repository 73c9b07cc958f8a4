"""What inference engines do with a checkpoint or an adapter, judged by the facts in engines.json.

engines        Read `engines.json`: the facts on what inference engines do with MLA checkpoints and adapters
items          Collect what an engine has to support in a checkpoint or an adapter, from configurations and headers
compatibility  Judge a checkpoint or an adapter for one engine: each item gets the verdict of the fact that fits it
unmerged       Say which engines would drop or refuse parts of a planned adapter if it is served unmerged
"""

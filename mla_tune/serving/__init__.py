"""What inference engines do with a checkpoint or an adapter, judged by the facts in engines.json.

engines        `engines.json`: what was seen that an inference engine does with MLA checkpoints and adapters
compatibility  What an inference engine will do with a checkpoint or an adapter: items seen in the files, judged by
               `engines.json`
items          What there is to be judged in a checkpoint or an adapter, from config.json, adapter_config.json and
               headers
unmerged       What inference engines would do with an adapter that is planned, if it is served unmerged: from
               `engines.json`
"""

"""How docs/results.md is made from the data files of studies: one module a concern, `page` on top.

study.json -> data (copy, read) -> figures (means, paired gains, names)
           -> tables, charts, goals, making -> page (templates)
"""

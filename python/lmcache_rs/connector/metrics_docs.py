"""The page docs/metrics.md, from the tables: run `python -m lmcache_rs.connector.metrics_docs` and redirect it."""

import sys

from lmcache_rs.config.docs import table
from lmcache_rs.connector.metric_names import COUNTERS, GAUGES, LABELLED
from lmcache_rs.connector.metric_reasons import REASONS

_PAGE = """\
# Metrics

<!-- Generated: edit python/lmcache_rs/connector/metric_names.py, then run
`python -m lmcache_rs.connector.metrics_docs > docs/metrics.md`. -->

They are on vLLM's own `/metrics`, with vLLM's labels `model_name` and `engine`:

    curl -s localhost:8000/metrics | grep lmcache:

vLLM's log has them too, in the line `KV Transfer metrics:`, by the names of the last column: what was added since the
line before. Names are LMCache's where it has the same. There are no histograms.

Of the tokens of a request (`num_lookup_tokens`), those that were found, from the first one on, count as
`num_lookup_hits`, those in vLLM's own prefix cache as `num_vllm_hit_tokens`, and those that were loaded beyond them as
`num_hit_tokens`. In the log `LMCache hit tokens` is what was found, and `need to load` what was loaded. The share of
tokens that need not be computed thanks to the cache:

    rate(lmcache:num_hit_tokens_total[5m]) / rate(lmcache:num_lookup_tokens_total[5m])

## Gauges

{gauges}
## Counters

On `/metrics` their names end in `_total`.

{counters}
## Counters with labels

A series appears with its first event. On the log line the labels follow the name, each after a colon.

{labelled}
## Reasons

{reasons}"""


def document() -> str:
    """The whole page."""
    heads = ("metric", "what", "on the log line")
    gauges = ((f"`{name}`", text, f"`{short}`") for short, (name, text) in GAUGES.items())
    counters = ((f"`{name}`", text, f"`{short}`") for short, (name, text) in COUNTERS.items())
    labelled = (
        (f"`{name}`", ", ".join(f"`{label}`" for label in labels), text, f"`{short}`")
        for short, (name, text, labels) in LABELLED.items()
    )
    reasons = (
        (f"`{LABELLED[short][0]}`", f"`{reason}`", text)
        for short, known in REASONS.items()
        for reason, text in known.items()
    )
    return _PAGE.format(
        gauges=table(heads, gauges),
        counters=table(heads, counters),
        labelled=table(("metric", "labels", "what", "on the log line"), labelled),
        reasons=table(("metric", "reason", "what it means"), reasons),
    )


if __name__ == "__main__":
    sys.stdout.write(document())

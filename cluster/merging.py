"""The metrics of several processes as one text, as the ingress gives it out."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

logger = logging.getLogger(__name__)


@dataclass
class _Merged:
    families: dict[str, Metric] = field(default_factory=dict)

    def collect(self) -> list[Metric]:
        return list(self.families.values())


def merge(expositions: Mapping[str, str]) -> str:
    """One text out of those of several processes; each sample gets a `process` label.

    expositions: text by process name. A text that does not parse is left out and logged.
    """
    merged = _Merged()
    for process, text in expositions.items():
        try:
            families = list(text_string_to_metric_families(text))
        except ValueError as error:
            logger.warning("metrics of %s do not parse and are left out: %s", process, error)
            continue
        for family in families:
            into = merged.families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            for sample in family.samples:
                labels = {**sample.labels, "process": process}
                into.add_sample(sample.name, labels, sample.value)
    return generate_latest(merged).decode()

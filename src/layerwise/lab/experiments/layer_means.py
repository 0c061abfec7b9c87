"""What was recorded of each layer, averaged over the seeds of an arm; of all arms by one query each."""

from __future__ import annotations

import polars

from layerwise.lab.experiments.results import Results, places_of

SCHEMA = {"layer": polars.String, "step": polars.Int64, "value": polars.Float64}


def layer_means(results: Results, subject: str, arm: str, quantity: str) -> polars.DataFrame:
    """Give the mean over seeds of a layer's quantity.

    Args:
        results: the finished runs.
        subject: its name.
        arm: its name.
        quantity: of the metrics.

    Returns:
        Layer, step, value, in the order in which they were recorded; empty if it was not.
    """
    return results.once(_means_by_arm).get((subject, arm, quantity), polars.DataFrame(schema=SCHEMA))


def layer_ranges(results: Results, quantity: str) -> dict[tuple[str, str], dict[str, tuple[float, float, float]]]:
    """Give mean, smallest and largest value of every layer over the steps, of the means over seeds that are numbers.

    Args:
        results: the finished runs, at least one.
        quantity: of the metrics.

    Returns:
        Subject and arm -> layer -> mean, smallest, largest.
    """
    arms, means = results.once(_means_of_layers)
    rows = (
        means.lazy()
        .filter((polars.col("quantity") == quantity) & polars.col("value").is_not_nan())
        .group_by("arm", "layer", maintain_order=True)
        .agg(polars.mean("value"), polars.min("value").alias("low"), polars.max("value").alias("high"))
        .collect()
    )
    found: dict[tuple[str, str], dict[str, tuple[float, float, float]]] = {}
    for place, layer, mean, low, high in rows.iter_rows():
        found.setdefault(arms[place], {})[layer] = mean, low, high
    return found


def _means_of_layers(results: Results) -> tuple[list[tuple[str, str]], polars.DataFrame]:
    """Give subjects with arms, and the means over seeds: place of the arm, quantity, layer, step, value."""
    arms = list(dict.fromkeys((subject, arm) for subject, arm, _ in results.records))
    keys = [(place, (*arm, seed)) for place, arm in enumerate(arms) for seed in results.of(*arm)]
    frames = [results.metrics(key) for _, key in keys]
    places = polars.Series("arm", [place for place, _ in keys], polars.UInt32)
    means = (
        polars.concat(frames)
        .with_columns(places.gather(places_of(frames)))
        .lazy()
        .filter(polars.col("layer").is_not_null())
        .group_by("arm", "quantity", "layer", "step", maintain_order=True)
        .agg(polars.col("value").mean())
        .collect()
    )
    return arms, means


def _means_by_arm(results: Results) -> dict[tuple[str, str, str], polars.DataFrame]:
    """Give the means of the layers: subject, arm, quantity -> layer, step, value."""
    if not results.records:
        return {}
    arms, means = results.once(_means_of_layers)
    parts = means.partition_by("arm", "quantity", as_dict=True, include_key=False, maintain_order=True)
    return {(*arms[place], quantity): rows for (place, quantity), rows in parts.items()}

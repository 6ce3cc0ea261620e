"""Spot nodes first, on-demand nodes while there are none: a utilization scorer for Ray's autoscaler on VMs.

Ray's own scorer is called first and decides between node types that differ in resources.  Among types of equal resources it
would ask for the same one for ever, also when the cloud has none left; here a type that was refused lately (Ray remembers it
for AUTOSCALER_NODE_AVAILABILITY_MAX_STALENESS_S, 30 minutes) comes after one that was not.  Among available equals Ray takes
the last name, so `train_spot` before `train_on_demand`.  The head finds it by RAY_AUTOSCALER_UTILIZATION_SCORER.
"""

from typing import Any

from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer as ray_score


def score(
    node_resources: dict[str, Any], resources: list[dict[str, Any]], node_type: str, *, node_availability_summary: Any
) -> tuple[Any, ...] | None:
    """Ray's score of one node of this type for the demanded bundles, then whether the type could be had when last asked for."""
    fit = ray_score(node_resources, resources, node_type, node_availability_summary=node_availability_summary)
    if fit is None:
        return None
    record = node_availability_summary.node_availabilities.get(node_type)
    return (*fit, record is None or record.is_available)

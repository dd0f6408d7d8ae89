"""What a trained model's routers learned: where they send each data set, who shares experts, what an expert is worth.

routes = mean_routes(model, loader)          # or read_routes("runs/smear-seed0")
plot_routing(routes, "routes.png")
"""

from smear_peft.analysis.compare import Similarity, Specialisation, similarity, specialisation
from smear_peft.analysis.places import Place, group_sites, place
from smear_peft.analysis.plot import plot_routing, plot_similarity
from smear_peft.analysis.routes import Routes, as_tensor, example_routes, mean_routes, read_routes
from smear_peft.analysis.worth import Worth, drop_expert, expert_worth

__all__ = [
    "Place",
    "Routes",
    "Similarity",
    "Specialisation",
    "Worth",
    "as_tensor",
    "drop_expert",
    "example_routes",
    "expert_worth",
    "group_sites",
    "mean_routes",
    "place",
    "plot_routing",
    "plot_similarity",
    "read_routes",
    "similarity",
    "specialisation",
]

"""Routing methods: one file an idea, one `register` a method.

A method is a `Router` that turns a `Query` (what a site knows about its batch) into a `Mixture` (what its experts are
to do), and an entry here. `register` adds one from outside.
"""

from smear_peft.routing.base import Method, Query, Router
from smear_peft.routing.dselect import DSelectRouter
from smear_peft.routing.fixed import AdamixRouter, HashRouter, SingleRouter, TagRouter, check_tag
from smear_peft.routing.hard import ReinforceRouter, STGumbelRouter, TopKRouter, check_top_k
from smear_peft.routing.mixture import Mixture, Policy, Slots, Use
from smear_peft.routing.registry import ROUTINGS, get_method, register, unregister
from smear_peft.routing.skills import SkillRouter, check_skills
from smear_peft.routing.soft_moe import SoftMoERouter
from smear_peft.routing.softmax import EnsembleRouter, SmearRouter, SoftmaxRouter

__all__ = [
    "ROUTINGS",
    "Method",
    "Mixture",
    "Policy",
    "Query",
    "Router",
    "Slots",
    "SoftmaxRouter",
    "Use",
    "get_method",
    "register",
    "unregister",
]

SMEAR_PAPER = "Muqeeth, Liu and Raffel, Soft Merging of Experts with Adaptive Routing, 2023"

register(
    "smear",
    SmearRouter,
    paper=f"{SMEAR_PAPER}, section 3",
    training="merges by p, after expert dropout",
    inference="merges by p",
    formula="u = f(y; sum_n p_n theta_n)",
    cost="one adapter, and one average of N experts per example",
    expert_dropout=0.1,
)
register(
    "ensemble",
    EnsembleRouter,
    paper=f"{SMEAR_PAPER}, section 3",
    training="mixes outputs by p",
    inference="mixes outputs by p",
    formula="u = sum_n p_n f(y; theta_n)",
    cost="N adapters",
)
register(
    "top_k",
    TopKRouter,
    paper="Shazeer et al., Outrageously large neural networks, 2017; Fedus et al., Switch transformers, 2021",
    training="runs the k likeliest experts, each times p, after expert dropout",
    inference="runs the k likeliest experts, each times p",
    formula="u = sum_(n in top k) p_n f(y; theta_n)",
    cost="k adapters",
    fields=("top_k", "gate"),
    expert_dropout=0.1,
    check=check_top_k,
)
register(
    "st_gumbel",
    STGumbelRouter,
    paper="Jang et al., Categorical reparameterization with Gumbel-softmax, 2016",
    training="runs n = argmax y, y = softmax((logits + g) / tau), times 1 - sg(y_n) + y_n",
    inference="runs n = argmax p",
    formula="u = (1 - sg(y_n) + y_n) f(y; theta_n)",
    cost="one adapter",
    fields=("temperature", "min_temperature", "anneal_rate", "gate"),
)
register(
    "reinforce",
    ReinforceRouter,
    paper="Clark et al., Unified scaling laws for routed language models, 2022",
    training="runs n ~ p",
    inference="runs n = argmax p",
    formula="u = f(y; theta_n); loss + alpha log p_n (L - b) + beta H(p) + gamma Huber(L - b)",
    cost="one adapter",
    fields=("policy_weight", "entropy_weight", "value_weight"),
    losses=("policy", "entropy", "value"),
    block_losses=("policy", "entropy", "value"),
)
register(
    "dselect_k",
    DSelectRouter,
    paper="Hazimeh et al., DSelect-k, 2021",
    training="mixes outputs by smooth selectors over binary codes",
    inference="the same",
    formula="u = sum_n w_n f(y; theta_n), w = sum_k softmax(x w)_k prod_bits(t or 1 - t)",
    cost="N adapters (one with selector_mode='top1')",
    fields=("top_k", "selector_mode", "selector_loss_weight"),
    losses=("selector",),
    block_losses=("selector",),
)
register(
    "soft_moe",
    SoftMoERouter,
    paper="Puigcerver et al., From sparse to soft mixtures of experts, 2023",
    training="gives each expert P weighted means of the positions",
    inference="the same",
    formula="u = C f(D^T y; theta_n)",
    cost="N * P slots through the experts, and two products with (L, N * P)",
    fields=("slots_per_expert",),
    sees_all_positions=True,
)
register(
    "tag",
    TagRouter,
    paper=f"{SMEAR_PAPER}, section 2.3",
    training="runs the task's expert",
    inference="the same",
    formula="u = f(y; theta_task)",
    cost="one adapter",
    needs=("routing_tags",),
    fields=("tasks", "task_to_expert"),
    check=check_tag,
)
register(
    "hash",
    HashRouter,
    paper="Roller et al., Hash layers for large sparse models, 2021",
    training="runs the expert that a hash of the example's id gives",
    inference="the same",
    formula="u = f(y; theta_hash(id, site))",
    cost="one adapter",
    needs=("example_ids",),
)
register(
    "latent_skills",
    SkillRouter,
    paper="Ponti et al., Combining modular skills in multitask learning, 2022",
    training="merges by a relaxed Bernoulli sample of the task's skills",
    inference="merges by the task's skills",
    formula="u = f(y; sum_n p_n theta_n), p = A[task] / sum A[task]",
    cost="one adapter, and one average of N experts per example",
    needs=("routing_tags",),
    fields=("tasks",),
    check=check_skills,
)
register(
    "adamix",
    AdamixRouter,
    paper="Wang et al., AdaMix, 2022",
    training="runs a random down- and a random up-projection, twice, with a consistency loss",
    inference="merges all experts evenly",
    formula="u = silu(y W_i + b_i) U_j; at inference f(y; mean_n theta_n)",
    cost="one adapter; two passes in training",
    fields=("consistency_weight",),
    losses=("consistency",),
)
register(
    "single",
    SingleRouter,
    paper="Houlsby et al., Parameter-efficient transfer learning for NLP, 2019",
    training="runs the one expert",
    inference="the same",
    formula="u = f(y; theta)",
    cost="one adapter, by definition",
)

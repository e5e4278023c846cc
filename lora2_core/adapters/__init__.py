"""The paper's layers on a model: layers, groups, targets, network, budget."""

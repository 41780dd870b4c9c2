"""The state dicts of tests/golden: projections of one input share a matrix there."""

FUSED = {  # name of such a matrix: whose rows it holds
    'qkv_proj': ('q_proj', 'k_proj', 'v_proj'),
    'kv_proj': ('k_proj', 'v_proj'),
    'qkv_a_proj': ('q_a_proj', 'q_proj', 'kv_a_proj', 'k_rope_proj'),
    'q_a_proj': ('q_a_proj', 'q_proj'),
    'kv_a_proj': ('kv_a_proj', 'k_rope_proj'),
    'kv_b_proj': ('k_b_proj', 'v_b_proj'),
}


def split_fused(weights, model):
    """A state dict in which projections may share a matrix -> one with a matrix for each, as the
    model has them."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    split = {}
    for name, weight in weights.items():
        *path, layer, kind = name.split('.')
        names = ['.'.join([*path, part, kind]) for part in FUSED.get(layer, ())]
        names = [part for part in names if part in shapes]
        dim = -1 if kind == 'bias' else -2  # channels come before the rows
        sizes = [shapes[part][dim] for part in names]
        if names and sum(sizes) == weight.size(dim):
            split |= dict(zip(names, weight.split(sizes, dim)))
        else:
            split[name] = weight
    return split

def install_rows(model, group):
    pass


def shard_attention(model, group):
    pass

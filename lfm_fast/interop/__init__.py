"""Other projects' networks as velocity fields that `lfm_fast.sample` takes, and their weights in our networks.

    lfm             sample_from_model, LFM's own signature; its networks need no adapter
    released        find_weights, save_released: LFM's files and where it keeps them
    sit             SiTVelocity; turned, a DiT whose time runs the other way
    dit             DiTVelocity, ThreeChannelGuidance
    flow_matching   FlowMatchingVelocity
    torchcfm        TorchCFMVelocity
    diffusers       DiffusersVelocity; to_diffusers and from_diffusers, the same weights either way
    files           convert: a file of any of these as a field of ours
    folder          the network's part of the folder that `LatentFlow.save_pretrained` writes
    recognise       recognise, from_state_dict: whose weights these are, where that is certain

A field is a network in an adapter, which says how its time runs, in which order it takes its arguments and what it
predicts; nothing of that is guessed.
"""

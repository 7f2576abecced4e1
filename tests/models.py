"""The models of the tests that take long."""

from timm_sknet.sknets import model_cfgs

# All but the larger networks of SimCLRv2, which have more or wider units of the same kind.
MODELS = [name for name in model_cfgs if not name.endswith('_simclr') or name == 'sk_resnet50x1_simclr']

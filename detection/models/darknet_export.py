"""A network as a Darknet description (.cfg), loadable by the Darknet program."""
from torch import nn
from detection.models.darknet_cfg import CfgSection
from detection.models.darknet_network import DarknetNetwork
from detection.settings import Settings
def describe_network(model: nn.Module, settings: Settings) -> list[CfgSection]:
    if isinstance(model, DarknetNetwork):
        return list(model.sections)
    raise NotImplementedError

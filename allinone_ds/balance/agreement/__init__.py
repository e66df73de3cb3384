"""What ranks tell each other before they compute together: the protocol, and the notices that they write."""

from allinone_ds.balance.agreement.protocol import Agreement

__all__ = ["Agreement"]

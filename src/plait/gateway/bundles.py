"""The last bundles, in memory, each for the key that paid for it only."""

from collections import OrderedDict
from dataclasses import dataclass, field


@dataclass(slots=True)
class BundleStore:
    """Holds at most ``count_max`` bundles and ``bytes_max`` bytes; the oldest go first."""

    count_max: int
    bytes_max: int
    _bundles: OrderedDict[str, tuple[str, bytes]] = field(default_factory=OrderedDict)
    _bytes: int = 0

    def put(self, name: str, owner: str, bundle: bytes) -> bool:
        """Keep a bundle; False if it alone is over the limit."""
        if len(bundle) > self.bytes_max or not self.count_max:
            return False
        self._bundles[name] = (owner, bundle)
        self._bytes += len(bundle)
        while len(self._bundles) > self.count_max or self._bytes > self.bytes_max:
            _, (_, oldest) = self._bundles.popitem(last=False)
            self._bytes -= len(oldest)
        return True

    def get(self, name: str, owner: str) -> bytes | None:
        """A bundle, if it is still here and this owner's."""
        whose, bundle = self._bundles.get(name, ("", None))
        return bundle if whose == owner else None

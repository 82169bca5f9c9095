from doran_serve.live import reload_adapter as reload_adapter
from doran_serve.live import reload_adapter_async as reload_adapter_async
from doran_serve.plugin import register as register
from doran_serve.publish import publish_adapter as publish_adapter
from doran_serve.store import AdapterStore as AdapterStore
from doran_serve.trl import AdapterSync as AdapterSync
from doran_serve.trl import with_adapter_sync as with_adapter_sync

__version__: str

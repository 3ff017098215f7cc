"""The directory's Kademlia network: the only place that imports `kademlia` and `rpcudp`.

Kept of the package: ids and nodes, the bucket and routing-table structure, the RPC naming. Replaced, because each was found
wanting: its datagrams (now sealed), its admission (now proven), its values (now signed records), its spider (now a crawler with
deadlines). What goes where: `seal` → `session` → `rpc` → `protocol` from the socket inwards; `routing`, `storage`, `peers` hold
state; `crawl` and `publish` act on it; `node` is the whole. Other rooms use `mesh.directory`.
"""

"""Matrix products by torch's calls, which of them is fastest where: what rules and backends build on."""

"""Names and hub ids become local folders; checkpoints become uploads; licences."""

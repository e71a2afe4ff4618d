package policy

// MaxShares bounds the shares of a machine.
const MaxShares = 1 << 20

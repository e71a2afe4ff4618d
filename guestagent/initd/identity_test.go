//go:build linux

package initd

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/gondola-vmm/gondola/guestagent/proto"
)

func TestServes(t *testing.T) {
	for _, tc := range []struct {
		args []string
		want bool
	}{
		{nil, false},
		{[]string{"udhcpc"}, true},
		{[]string{"/sbin/udhcpc", "-b", "-i", "eth0", "-s", "/x"}, true},
		{[]string{"udhcpc", "-ieth0"}, true},
		{[]string{"udhcpc", "--interface=eth0"}, true},
		{[]string{"udhcpc", "--interface", "eth0"}, true},
		{[]string{"udhcpc", "-i", "eth1"}, false},
		{[]string{"udhcpc", "-f", "--interface=eth1"}, false},
		{[]string{"busybox", "udhcpc", "-i", "eth0"}, true},
		{[]string{"busybox", "udhcpd", "-i", "eth0"}, false},
		{[]string{"busybox"}, false},
		{[]string{"dhclient", "-4", "-v", "-pf", "/run/dhclient.eth0.pid", "eth0"}, true},
		{[]string{"sleep", "eth0"}, false},
	} {
		assert.Equal(t, tc.want, serves(tc.args, "eth0"), "%q", tc.args)
	}
	assert.False(t, serves([]string{"udhcpc"}, "eth1"), "it is eth0's")
}

func TestDefaultGateways(t *testing.T) {
	const table = `Iface	Destination	Gateway 	Flags	RefCnt	Use	Metric	Mask		MTU	Window	IRTT
eth0	00000000	0202000A	0003	0	0	0	00000000	0	0	0
eth1	00000000	0103000A	0003	0	0	0	00000000	0	0	0
eth0	0002000A	00000000	0001	0	0	0	00FFFFFF	0	0	0
eth0	00000000	00000000	0001	0	0	0	00000000	0	0	0
eth0	00000000	zz	0003
eth0
`
	assert.Equal(t, []netip.Addr{netip.MustParseAddr("10.0.2.2")}, defaultGateways(table, "eth0"))
	assert.Empty(t, defaultGateways("", "eth0"))
}

// What a host says is checked; an interface that is not there is none of this guest's.
func TestBecomeChecks(t *testing.T) {
	d := &initd{}
	unicast, other := []byte{2, 0xfe, 0xfe, 0xfe, 0xfe, 1}, []byte{2, 0xfe, 0xfe, 0xfe, 0xfe, 2}
	assert.Error(t, d.become(&proto.NetIdentity{Was: unicast[:5], MAC: other}))
	assert.Error(t, d.become(&proto.NetIdentity{Was: unicast, MAC: []byte{1, 0, 0, 0, 0, 0}}))
	assert.NoError(t, d.become(&proto.NetIdentity{Was: unicast, MAC: other, Address: "10.0.0.1/8"}))
}

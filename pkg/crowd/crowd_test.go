package crowd

import (
	"context"
	"net"
	"slices"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// visitors enter a crowd and note who was dropped.
type visitors struct {
	c       *Crowd
	places  map[string]*Place
	dropped []string
}

func (v *visitors) enter(t *testing.T, from, name string) {
	t.Helper()
	p, err := v.c.Enter(t.Context(), from, func() { v.dropped = append(v.dropped, name) })
	require.NoError(t, err)
	v.places[name] = p
}

func newVisitors(n int) *visitors { return &visitors{c: New(n), places: make(map[string]*Place)} }

// However many connections one address makes, those of others keep their places
// (fault B4, trap R3).
func TestManyConnectionsOfOneAddressTakeNoOthersPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVisitors(4)
		v.enter(t, "b", "other")
		for i := range 50 {
			v.enter(t, "a", strconv.Itoa(i))
		}
		v.enter(t, "c", "third")
		require.NotContains(t, v.dropped, "other")
		require.Len(t, v.dropped, 48)
		require.True(t, slices.IsSortedFunc(v.dropped, func(a, b string) int { return len(a) - len(b) }), "the oldest first: %v", v.dropped)
		require.True(t, v.places["other"].Leave())
		require.False(t, v.places["0"].Leave(), "it was taken away")
	})
}

// No newcomer takes a place away that was only just given (fault B4).
func TestPlaceIsKeptForItsTenure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v, begin := newVisitors(2), time.Now()
		for i := range 9 {
			v.enter(t, "", strconv.Itoa(i))
		}
		require.Equal(t, 4*Tenure, time.Since(begin), "two each")
		require.Equal(t, []string{"0", "1", "2", "3", "4", "5", "6"}, v.dropped)
	})
}

func TestPlaceThatIsGivenBackIsGivenAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v, begin := newVisitors(1), time.Now()
		v.enter(t, "", "a")
		time.AfterFunc(time.Millisecond, func() { v.places["a"].Leave() })
		v.enter(t, "", "b")
		require.Equal(t, time.Millisecond, time.Since(begin))
		require.Empty(t, v.dropped)
		v.c.Clear()
		require.Equal(t, []string{"b"}, v.dropped)
		require.Zero(t, v.c.Len())
	})
}

func TestWaitingForAPlaceIsGivenUp(t *testing.T) {
	v := newVisitors(1)
	v.enter(t, "", "a")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := v.c.Enter(ctx, "", func() {})
	require.ErrorIs(t, err, context.Canceled)
	require.Empty(t, v.dropped)
}

func TestAddressIsThatOfTheHost(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	defer c.Close()
	require.Equal(t, "127.0.0.1", Address(c))
	require.Empty(t, Address(new(int)))
}

package nbdexport

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// sendOption sends an option; replies reads what comes of it.
func (c *rawClient) sendOption(opt uint32, data []byte) {
	c.t.Helper()
	c.send(magicOption, opt, uint32(len(data)), data)
}

// A client that comes before the disk it names waits for it, as long as it takes, by
// each of the options that name one; LIST and the log say so (fault H14).
func TestClientWaitsForAnExportThatIsToCome(t *testing.T) {
	for name, ask := range map[string]func(c *rawClient){
		"go":      func(c *rawClient) { c.sendOption(optGo, infoData("vm")) },
		"info":    func(c *rawClient) { c.sendOption(optInfo, infoData("vm")) },
		"default": func(c *rawClient) { c.sendOption(optGo, infoData("")) },
		"meta": func(c *rawClient) {
			require.Equal(c.t, repAck, c.outcome(optStructuredReply, nil))
			c.sendOption(optSetMetaContext, metaData("vm", contextAllocation))
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log bytes.Buffer
				s := NewServer(Options{Expected: []string{"vm"}, Log: slog.New(slog.NewTextHandler(&log, nil))})
				c := pipeClient(t, s)
				c.greet(clientFixedNewstyle | clientNoZeroes)
				rs := c.option(optList, nil)
				require.Len(t, rs, 2)
				require.Contains(t, string(rs[0].data), "vmhas not come yet")
				ask(c)
				pass(time.Hour)
				synctest.Wait()
				require.Equal(t, 1, s.Waits().Count)
				require.Equal(t, time.Hour, s.Waits().Oldest.Round(time.Minute))
				require.Equal(t, 3, strings.Count(log.String(), "a client waits for an export that has not come yet"))
				require.NoError(t, s.AddExport(Export{Name: "vm", Backend: newDisk(mib)}))
				opt := map[string]uint32{"go": optGo, "info": optInfo, "default": optGo, "meta": optSetMetaContext}[name]
				rs = c.replies(opt)
				require.Equal(t, repAck, rs[len(rs)-1].typ)
				synctest.Wait()
				require.Zero(t, s.Waits().Count)
				require.NoError(t, s.Close())
			})
		})
	}
}

// Nothing is waited for that is not to come, and nothing any more when the server
// ends; a client that gives up is let go (fault H14).
func TestWaitForAnExportEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewServer(Options{Expected: []string{"vm", "data"}})
		enter := func() *rawClient {
			c := pipeClient(t, s)
			c.greet(clientFixedNewstyle | clientNoZeroes)
			return c
		}
		require.Equal(t, repErrUnknown, enter().outcome(optGo, infoData("other")))
		require.Equal(t, repErrUnknown, enter().outcome(optGo, infoData("")), "it could mean either")
		require.NoError(t, s.AddExport(Export{Name: "data", Backend: newDisk(mib)}))
		enter().enterAs(optGo, "data")
		require.Equal(t, repErrUnknown, enter().outcome(optGo, infoData("other")))

		c := enter()
		c.sendOption(optGo, infoData("vm"))
		synctest.Wait()
		require.Equal(t, 1, s.Waits().Count)
		done := make(chan error, 1)
		go func() { done <- s.Shutdown(context.Background()) }()
		rs := c.replies(optGo)
		require.Equal(t, repErrShutdown, rs[0].typ)
		require.NoError(t, <-done)
	})
}

func (c *rawClient) enterAs(opt uint32, name string) {
	c.t.Helper()
	require.Equal(c.t, repAck, c.outcome(opt, infoData(name)))
}

// Whose name is not known, any name may be, until it has come (fault H14).
func TestAnyNameIsWaitedForWhereNoneIsKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewServer(Options{ExpectAny: true})
		var cs []*rawClient
		for _, name := range []string{"vm", "", "wrong"} {
			c := pipeClient(t, s)
			c.greet(clientFixedNewstyle | clientNoZeroes)
			c.sendOption(optGo, infoData(name))
			cs = append(cs, c)
		}
		synctest.Wait()
		require.Equal(t, 3, s.Waits().Count)
		require.NoError(t, s.AddExport(Export{Name: "vm", Backend: newDisk(mib)}))
		for i, want := range []uint32{repAck, repAck, repErrUnknown} {
			rs := cs[i].replies(optGo)
			require.Equal(t, want, rs[len(rs)-1].typ)
		}
		require.NoError(t, s.Close())
	})
}

// However many come too early, they cost a bounded number of places, and one that
// hangs up gives its own back (fault H14).
func TestClientsThatWaitForAnExportAreBounded(t *testing.T) {
	s, path := newTestServer(t, Options{ExpectAny: true})
	var cs []*rawClient
	for range maxHeld {
		c := dialRaw(t, path)
		c.greet(clientFixedNewstyle | clientNoZeroes)
		c.sendOption(optGo, infoData("vm"))
		cs = append(cs, c)
	}
	require.Eventually(t, func() bool { return s.Waits().Count == maxHeld }, 10*time.Second, time.Millisecond)
	more := dialRaw(t, path)
	more.greet(clientFixedNewstyle | clientNoZeroes)
	require.Equal(t, repErrPolicy, more.outcome(optGo, infoData("vm")))
	require.NoError(t, cs[0].Close())
	require.Eventually(t, func() bool { return s.Waits().Count == maxHeld-1 }, 10*time.Second, time.Millisecond)
}

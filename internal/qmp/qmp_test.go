package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}`

// fake is QEMU's end of a connection.
type fake struct {
	t    *testing.T
	conn net.Conn
	in   *bufio.Scanner
}

func (f *fake) say(format string, args ...any) {
	_, err := fmt.Fprintf(f.conn, format+"\r\n", args...)
	require.NoError(f.t, err)
}

// hear reads a command, and returns its id and what was asked for.
func (f *fake) hear() (id int, asked string) {
	require.True(f.t, f.in.Scan(), "a command was expected: %v", f.in.Err())
	var c struct {
		Execute   string
		Arguments json.RawMessage
		ID        int
	}
	require.NoError(f.t, json.Unmarshal(f.in.Bytes(), &c))
	return c.ID, strings.TrimSpace(c.Execute + " " + string(c.Arguments))
}

// expect hears a command and answers it.
func (f *fake) expect(asked, answer string) {
	id, heard := f.hear()
	require.Equal(f.t, asked, heard)
	f.say(`{"id": %d, %s}`, id, answer)
}

// talk runs a test with a client that has greeted, inside a bubble.
func talk(t *testing.T, test func(t *testing.T, c *Client, f *fake)) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		f := &fake{t, theirs, bufio.NewScanner(theirs)}
		go func() {
			f.say(greeting)
			f.expect("qmp_capabilities", `"return": {}`)
		}()
		c, err := New(t.Context(), ours)
		require.NoError(t, err)
		test(t, c, f)
		require.NoError(t, c.Close())
		_ = theirs.Close() // the client has
	})
}

func TestCommandIsAnswered(t *testing.T) {
	talk(t, func(t *testing.T, c *Client, f *fake) {
		go f.expect(`migrate {"uri":"unix:/run/m"}`, `"return": {"status": "active", "ram": {"transferred": 7}}`)
		var answer struct {
			Status string
			RAM    struct{ Transferred int64 }
		}
		require.NoError(t, c.Execute(t.Context(), "migrate", map[string]string{"uri": "unix:/run/m"}, &answer))
		require.Equal(t, "active", answer.Status)
		require.EqualValues(t, 7, answer.RAM.Transferred)
	})
}

func TestRefusalIsAnError(t *testing.T) {
	talk(t, func(t *testing.T, c *Client, f *fake) {
		go f.expect("cont", `"error": {"class": "GenericError", "desc": "not now"}`)
		var no *Error
		require.ErrorAs(t, c.Execute(t.Context(), "cont", nil, nil), &no)
		require.Equal(t, Error{"cont", "GenericError", "not now"}, *no)
		go f.expect("cont", `"return": {}`)
		require.NoError(t, c.Execute(t.Context(), "cont", nil, nil), "the next command goes through")
	})
}

func TestAnswerThatComesTooLateIsNotTakenForTheNext(t *testing.T) {
	talk(t, func(t *testing.T, c *Client, f *fake) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		late := make(chan int, 1)
		go func() {
			id, _ := f.hear()
			late <- id
		}()
		require.ErrorIs(t, c.Execute(ctx, "slow", nil, nil), context.DeadlineExceeded)
		go func() {
			id, _ := f.hear()
			f.say(`{"id": %d, "return": "of the slow one"}`, <-late)
			f.say(`{"id": %d, "return": "right"}`, id)
		}()
		var answer string
		require.NoError(t, c.Execute(t.Context(), "next", nil, &answer))
		require.Equal(t, "right", answer)
	})
}

func TestEventsAreGivenOutOnceAndInAnyOrder(t *testing.T) {
	named := func(name string) func(Event) bool { return func(e Event) bool { return e.Name == name } }
	talk(t, func(t *testing.T, c *Client, f *fake) {
		f.say(`{"timestamp": {"seconds": 10, "microseconds": 500000}, "event": "STOP"}`)
		f.say(`{"timestamp": {"seconds": 11, "microseconds": 0}, "event": "MIGRATION", "data": {"status": "pre-switchover"}}`)
		e, err := c.Await(t.Context(), named("MIGRATION"))
		require.NoError(t, err)
		require.Equal(t, `MIGRATION {"status": "pre-switchover"}`, e.String())
		e, err = c.Await(t.Context(), named("STOP"))
		require.NoError(t, err, "it had come before, and was not asked for")
		require.Equal(t, time.Unix(10, 500_000_000), e.Time)

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err = c.Await(ctx, named("STOP"))
		require.ErrorIs(t, err, context.DeadlineExceeded, "it was given out already")
		go f.say(`{"event": "STOP"}`)
		_, err = c.Await(t.Context(), named("STOP"))
		require.NoError(t, err, "another one")
	})
}

func TestOnlyTheLastEventsAreKept(t *testing.T) {
	talk(t, func(t *testing.T, c *Client, f *fake) {
		for i := range maxEvents + 10 {
			f.say(`{"event": "E", "data": %d}`, i)
		}
		synctest.Wait()
		e, err := c.Await(t.Context(), func(Event) bool { return true })
		require.NoError(t, err)
		require.Equal(t, "E 10", e.String())
	})
}

func TestQEMUThatEndsWakesAllWhoWait(t *testing.T) {
	talk(t, func(t *testing.T, c *Client, f *fake) {
		failed := make(chan error, 2)
		go func() { failed <- c.Execute(t.Context(), "query-status", nil, nil) }()
		f.hear()
		go func() {
			_, err := c.Await(t.Context(), func(e Event) bool { return e.Name == "RESUME" })
			failed <- err
		}()
		synctest.Wait()
		f.say(`{"event": "SHUTDOWN"}`)
		require.NoError(t, f.conn.Close())
		require.ErrorContains(t, <-failed, "QEMU has hung up")
		require.ErrorContains(t, <-failed, "QEMU has hung up")
		_, err := c.Await(t.Context(), func(e Event) bool { return e.Name == "SHUTDOWN" })
		require.NoError(t, err, "what came before the end is there")
		require.ErrorContains(t, c.Execute(t.Context(), "cont", nil, nil), "QEMU has hung up")
	})
}

func TestCloseWakesAllWhoWait(t *testing.T) {
	talk(t, func(t *testing.T, c *Client, f *fake) {
		failed := make(chan error, 1)
		go func() {
			_, err := c.Await(t.Context(), func(Event) bool { return false })
			failed <- err
		}()
		synctest.Wait()
		require.NoError(t, c.Close())
		require.ErrorIs(t, <-failed, ErrClosed)
		require.NoError(t, c.Close(), "twice")
	})
}

func TestWhatIsNoQEMUIsRefused(t *testing.T) {
	for _, says := range []string{"SSH-2.0-OpenSSH_9.2\n", `{"return": {}}` + "\n", "[]\n", "", strings.Repeat("x", maxLine+1)} {
		synctest.Test(t, func(t *testing.T) {
			ours, theirs := net.Pipe()
			go func() {
				_, err := io.WriteString(theirs, says)
				_ = errors.Join(err, theirs.Close()) // the client may have hung up first
			}()
			_, err := New(t.Context(), ours)
			require.ErrorContains(t, err, "qmp: ")
		})
	}
}

func TestQEMUThatDoesNotGreetIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err := New(ctx, ours)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.NoError(t, theirs.Close())
	})
}
